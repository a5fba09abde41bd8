"""The point branch in the files of other packages."""
