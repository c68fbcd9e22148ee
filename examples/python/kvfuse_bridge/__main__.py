"""Command line of the bridge."""

import argparse

from . import dump, press, score


def measured(command):
    command.add_argument("--block-size", type=int, default=16)
    command.add_argument("--max-new-tokens", type=int, default=32)
    command.add_argument("--resamples", type=int, default=2000)
    command.add_argument("--seed", type=int, default=0)


def main():
    parser = argparse.ArgumentParser(prog="kvfuse-bridge", description=__doc__)
    commands = parser.add_subparsers(required=True)

    def command(name, module, about):
        own = commands.add_parser(name, help=about, description=module.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
        own.add_argument("--model", required=True, help="hub name, folder or GGUF file")
        own.add_argument("--device", default="cpu")
        own.add_argument("-o", "--out", required=True)
        own.set_defaults(run=module.run)
        return own

    own = command("dump", dump, "KV caches of a transformers model as a dump")
    prompts = own.add_mutually_exclusive_group(required=True)
    prompts.add_argument("--like", metavar="DUMP", help="the prompts of another dump")
    prompts.add_argument("--prompts", metavar="FILE", help="JSON lines with prompt and answers")
    own.add_argument("--stop", help="text that ends an answer")
    own.add_argument("--dtype", choices=list(dump.files.DTYPES), default="f16")
    own = command("score", score, "KL and answers through decoded caches, as tables of a sweep")
    own.add_argument("dump", help="the unencoded dump")
    own.add_argument("decoded", nargs="+", help="dumps that kvfuse decode wrote")
    measured(own)
    own = command("press", press, "presses of kvpress as methods beside kvfuse's own")
    own.add_argument("dump", help="the unencoded dump")
    own.add_argument("--press", required=True, nargs="+", help="classes of kvpress, as SnapKVPress")
    own.add_argument("--ratio", type=float, required=True, nargs="+", help="share of the tokens that is dropped")
    measured(own)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
