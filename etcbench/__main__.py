"""``python -m etcbench``, also what ``accelerate launch -m etcbench`` starts."""

from etcbench.cli import main

if __name__ == "__main__":
    main()
