from sft.commands import main

if __name__ == "__main__":
    main("benchmark")
