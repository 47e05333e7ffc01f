"""Between a checkpoint and something that answers: fetch, import, merge, export."""
