"""C++ backends of the ops, behind the signatures that every backend shares."""
