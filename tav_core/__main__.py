from .cli import main

if __name__ == "__main__":  # the benchmark starts processes that import this
    main("python -m tav_core")
