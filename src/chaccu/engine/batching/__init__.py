"""Answers of one model stepped together: the tasks, the rounds of work on them, the cache with a row for each.

Imported when the engine `transformers` loads, for it needs torch.
"""
