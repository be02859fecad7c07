"""What both stages share: the feature store, files, mesh and sharding, tokenising, layers, progress."""
