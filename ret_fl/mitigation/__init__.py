"""What keeps a proxy from memorizing: AGC (which losses give gradient) and TAA (which images are augmented)."""
