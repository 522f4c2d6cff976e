"""One thin adapter per framework; each imports its framework only when a seam is reached."""

if __name__ == "adapters":  # a checkout on sys.path must not shadow anybody's own `adapters`
    raise ImportError("this folder is the package graftq.adapters; import it by that name")
