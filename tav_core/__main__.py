from .start import start


def main(prog: str = "tune-a-video"):
    """The command `tune-a-video`."""
    start(".cli", prog)


if __name__ == "__main__":  # the benchmark starts processes that import this
    main("python -m tav_core")
