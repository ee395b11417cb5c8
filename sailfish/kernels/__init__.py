"""The ops a decoder is made of: contracts, references, implementations, and the choice among them."""
