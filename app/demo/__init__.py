"""The demo: three nodes on this machine, a kill, restores from memory and from disk, every tensor compared.

`story` tells it; the other modules are what it needs for that: the nodes as processes (`fleet`), an engine's rank
beside one of them (`rank`, `rank_process`), who cleans up whatever happens (`janitor`), who compares with the
checkpoint (`comparison`), what the page cache holds (`page_cache`), and what is shown (`stage`).
"""
