"""From documents to segments: split, encode, number, write."""
