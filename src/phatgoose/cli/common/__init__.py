"""What several commands share: options, loading a base and a pool, and streaming text to a terminal."""
