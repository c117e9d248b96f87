"""The version of the installed distribution."""

from importlib.metadata import PackageNotFoundError, version

try:
    VERSION = version("hotspare")
except PackageNotFoundError:  # run from a tree that was never installed
    VERSION = "0+unknown"
