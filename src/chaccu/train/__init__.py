"""Conversations to a trained model: recipe, packing, loss, optimizer, loop, checkpoint."""
