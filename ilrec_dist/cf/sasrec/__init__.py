"""SASRec: the model, its training, its checkpoints."""
