"""What several patterns share: ranking, blocks of keys, k-means within a sentence."""
