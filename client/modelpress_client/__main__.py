"""`python -m modelpress_client`: the same as `compress-client`."""

from modelpress_client.cli import main

if __name__ == "__main__":
    main()
