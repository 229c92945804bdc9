"""Start the application: `python -m app --help` shows the flags.

Functions import the other modules of the application when they are called: `--help` appears at once, torch reads the
settings of `limit_spinning`, and Gradio reads the working directory.
"""

import argparse
import os
import shutil
import signal
import sys
import tempfile
import warnings
import webbrowser
from pathlib import Path
from typing import Any

from reslora.options.argument_parser import Parser
from reslora.options.images import Options
from reslora.runtime.script import limit_spinning

from .access import OwnPagesOnly, is_loopback


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of `python -m app`."""
    parser = Parser(prog="python -m app", description="Watch LoRA and ResLoRA learn, and use the result.")
    add = parser.add_argument
    add("--runs", type=Path, default=Path("runs"), metavar="DIR", help="folder of runs (default: runs)")
    add(
        "--data",
        type=Path,
        metavar="DIR",
        help="folder whose folders of images may be viewed, edited and trained on",
    )
    add("--host", default="127.0.0.1", help="address to listen on; others than this machine's need --auth")
    add("--port", type=int, help="port (default: the first free one from 7860)")
    add(
        "--allow-host",
        action="append",
        default=[],
        metavar="NAME",
        help="host name by which a proxy calls the page; may be repeated",
    )
    add("--share", action="store_true", help="a public link through gradio.live; needs --auth")
    add("--auth", metavar="USER:PASSWORD", help="ask for this name and password")
    add("--inbrowser", action="store_true", help="open the page")
    return parser


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Return the parsed options.

    For an invalid value, print one line to stderr and exit with status 2. An address that other machines can reach is
    invalid without `--auth`.
    """
    parser = build_parser()
    args = parser.parse_args(argv)
    user, colon, password = (args.auth or "").partition(":")
    if args.auth is not None and not (user and colon and password):
        parser.error("--auth: give a name and a password, as in --auth me:secret")
    if args.auth is None and (args.share or not is_loopback(args.host)):
        flag = "--share" if args.share else f"--host {args.host}"
        parser.error(f"{flag}: others could start trainings on this machine; add --auth USER:PASSWORD")
    if args.port is not None and not 0 < args.port < 65536:
        parser.error(f"--port {args.port}: give a number from 1 to 65535")
    if args.data is not None and not args.data.is_dir():
        parser.error(f"--data {args.data}: no such folder; give one with folders of images")
    if args.runs.exists() and not args.runs.is_dir():
        parser.error(f"--runs {args.runs}: not a folder; give one with the outputs of train_sd.py")
    if (args.runs / "config.json").exists():
        parser.error(f"--runs {args.runs}: this is a run; give the folder that contains it")
    args.auth = (user, password) if args.auth else None
    return args


def main(argv: list[str] | None = None) -> int:
    """Serve the page until Ctrl-C or SIGTERM, and return the exit status."""
    args = parse_args(argv)
    # A process that a shell starts in the background ignores SIGINT; restoring the handler lets SIGINT end the process.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    limit_spinning()
    sys.setswitchinterval(0.001)  # so that a page is answered soon while a thread generates images
    neutral = Path(tempfile.mkdtemp(prefix="reslora-app-"))
    try:
        return serve(args, neutral)
    except KeyboardInterrupt:
        return 0
    finally:
        os.chdir("/")
        shutil.rmtree(neutral, ignore_errors=True)


def serve(args: argparse.Namespace, neutral: Path) -> int:
    """Serve the page until it is closed, and return the exit status: 1 if the server cannot start, else 0.

    `neutral`: an empty folder. The folder becomes the working directory, because Gradio serves files from the working
    directory.
    """
    from .jobs import Jobs
    from .library import Library
    from .runs import EXAMPLE

    default_output = Path(Options.of().output.output_dir)
    library = Library(args.runs.absolute(), (default_output.absolute(), EXAMPLE))
    jobs = Jobs(library, args.data.absolute() if args.data else None)
    move_to(neutral)
    from . import page
    from .studio import Studio

    # Future warnings of libraries address programmers, not the user who starts the page.
    warnings.filterwarnings("ignore", category=FutureWarning)
    studio = Studio()
    jobs.keep_going()
    demo = page.create_demo(library, jobs, studio)
    try:
        listen(demo, args)
    except OSError as error:
        print(f"python -m app: {str(error).splitlines()[0]}", file=sys.stderr)
        return 1
    finally:
        studio.cancel()
        jobs.close()
    return 0


def listen(demo: Any, args: argparse.Namespace) -> None:
    """Serve the Gradio `Blocks` in `demo` until they are closed, even if the server's first response is slow."""
    try:
        demo.launch(**launch_settings(args))
    except ValueError:
        # Gradio raises if its own page does not answer within three seconds, as on a busy machine. The server runs
        # nevertheless.
        if not demo.is_running:
            raise
        print(f"python -m app: {demo.local_url} is slow to respond; the server keeps running", file=sys.stderr)
        if args.inbrowser:
            webbrowser.open(demo.local_url)
        demo.block_thread()


def launch_settings(args: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments of Gradio's `launch`."""
    from starlette.middleware import Middleware

    from .handlers import cannot_store
    from .page import look
    from .weight_files import LARGEST_ADAPTER

    own_pages = Middleware(OwnPagesOnly, bound=args.host, allowed=args.allow_host, shared=args.share)
    return {
        "server_name": args.host, "server_port": args.port, "share": args.share, "auth": args.auth,
        "inbrowser": args.inbrowser, "show_error": True, "ssr_mode": False, "max_file_size": LARGEST_ADAPTER,
        "footer_links": [], "run_history": False,
        "app_kwargs": {"middleware": [own_pages], "exception_handlers": {OSError: cannot_store}},
        **look(),
    }  # fmt: skip


def move_to(neutral: Path) -> None:
    """Make the empty folder `neutral` the working directory, and its new folder `tmp` the temporary folder.

    Gradio serves files from both folders, so they must not contain files of the user.
    """
    (neutral / "tmp").mkdir()
    os.environ["GRADIO_TEMP_DIR"] = str(neutral / "served")
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    # Otherwise every answer waits 0.02 to 0.1 s for Gradio's table of the last 10,000 requests, which the page does not
    # use.
    os.environ["GRADIO_ANALYTICS_MAX_EVENTS"], os.environ["GRADIO_ANALYTICS_CACHE_FREQUENCY"] = "1", str(2**62)
    tempfile.tempdir = str(neutral / "tmp")
    os.chdir(neutral)


if __name__ == "__main__":
    sys.exit(main())
