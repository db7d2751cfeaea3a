"""Running the apps without a network, and studies of the method."""
