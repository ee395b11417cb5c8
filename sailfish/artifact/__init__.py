"""The engine directory: an immutable manifest with digests, weights by reference or inside, side files."""

from sailfish.artifact.manifest import Manifest
from sailfish.artifact.reader import Artifact, StoredTensor

__all__ = ["Artifact", "Manifest", "StoredTensor"]
