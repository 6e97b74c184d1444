"""A convolutional or fully connected autoencoder, pruned by the same code as the agent."""
