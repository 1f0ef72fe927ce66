"""Training: an autoencoder, then a text-conditioned latent diffusion model, from one configuration file."""
