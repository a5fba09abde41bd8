"""How is a data set written as WebDataset tars, proved whole and read at random? The reader is `readers/shards.py`."""
