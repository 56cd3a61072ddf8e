"""The version of the package; pyproject.toml and CMake read it from here."""

__all__ = ["__version__"]

__version__ = "0.1.0"
