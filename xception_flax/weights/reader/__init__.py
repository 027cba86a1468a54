"""The process that reads files of other libraries, a module for each format.

A file of weights may come from anywhere. Damaged files have crashed libhdf5, or kept it busy for ever in native code,
where Python handles no signals. And HDF5 can read other files of this machine as data. So this package runs as a
process of its own, started by `weights.reading`. It has limited time and memory, and sends back either arrays of
numbers or an error message through a pipe. However it ends, the caller goes on. It imports NumPy and the one library
that the format needs, and nothing else of `xception_flax`.

Every module has `read(path, room)`, which returns `Contents`. It raises ValueError where the file is not as it should
be; the message is the reason, without the file's name. Whatever else a library raises also counts as damage.
"""
