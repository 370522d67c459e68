"""What each engine says of itself, without importing what it is made of: a configuration is checked before torch is
there. To add an engine, write its file here and name it in `table.py`; the engine itself is a file beside the others.
"""
