"""Discovery, configuration and the command line. Importing this package imports neither torch nor a framework."""

if __name__ == "plugin":  # a checkout on sys.path must not shadow anybody's own `plugin`
    raise ImportError("this folder is the package graftq.plugin; import it by that name")
