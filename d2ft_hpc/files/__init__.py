"""Files that outlive a power cut, and files that anybody may have written.

`atomic` writes: all of a file or nothing of it, on disk when the call returns. `untrusted` and `hdf5` read: within
limits that are known before anything is allocated, and nothing outside the file.
"""
