"""An engine's side of a restore: `restorer` is what it uses, `ladder` the order in which sources are tried.

The only part of `transfer` that speaks HTTP (`http`, and `control_plane` on it).
"""
