"""Commands of a contributor: train an expert, its gates, its data signature; convert and publish."""
