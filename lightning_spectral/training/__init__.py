"""One run: recipe documents, their schema, pretraining, checkpoints, and measuring what was trained."""
