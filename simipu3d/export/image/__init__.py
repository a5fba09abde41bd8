"""The image branch in the files of other packages."""
