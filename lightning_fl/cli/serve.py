"""Serves the model of a run or a checkpoint over HTTP: POST /predict, GET /health, GET /metrics.

The body is {"inputs": [example, ...]}; the response is {"outputs": ..., "round": ..., "model": ...}. Inputs of another
shape get status 400, a client without a model 404. With --watch the next round's checkpoint replaces the model while
the server keeps running. There is no authentication: put it behind your own proxy.

Examples:
  lightning-fl serve lightning_logs/version_0 --watch
  lightning-fl serve last.ckpt --clients --port 9000
  lightning-fl serve last.ckpt --canary new.ckpt --share 0.1
"""

from __future__ import annotations

import argparse
from pathlib import Path

from lightning_fl.cli.export import add_model_arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    add_model_arguments(parser)
    parser.add_argument("--host", default="127.0.0.1", choices=("127.0.0.1", "0.0.0.0", "::"), help="(%(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="(default: %(default)s)")
    parser.add_argument("--workers", type=int, default=1, help="worker processes (default: %(default)s)")
    parser.add_argument("--max-requests", type=int, help="maximum of pending requests; others get 503 (default: 256)")
    parser.add_argument("--clients", action="store_true", help="answer with a client's model if X-Client names one")
    parser.add_argument("--watch", action="store_true", help="reload the checkpoint when its file is replaced")
    parser.add_argument("--canary", type=Path, help="another checkpoint of the same module, for a share of requests")
    parser.add_argument("--share", type=float, help="the canary's share, chosen by X-Request-Id (default: 0.1)")


def run(args: argparse.Namespace) -> None:
    """Serves until it is stopped."""
    try:
        from lightning_fl.serving.server import MAX_REQUESTS, ModelAPI, serve
    except ImportError as error:
        raise ImportError(f'Serving needs more packages: pip install "lightning-fl[serving]". ({error})') from error
    from lightning_fl import serving
    from lightning_fl.serving.models import ServedModels

    if args.share is not None and args.canary is None:
        raise ValueError("--share is the canary's share; name the canary's checkpoint with --canary.")
    share = 0.1 if args.share is None else args.share
    if not 0 <= share <= 1:
        raise ValueError(f"--share {share} must be from 0 to 1.")
    if args.workers < 1:
        raise ValueError(f"--workers {args.workers} must be at least 1.")
    if args.max_requests is not None and args.max_requests < 1:
        raise ValueError(f"--max-requests {args.max_requests} must be at least 1.")
    checkpoint = serving.find_checkpoint(args.run)
    # Loaded here first, so that errors are reported in one line rather than by a worker's traceback.
    module = serving.load_module(checkpoint, args.module, base=args.base)
    serving.example_inputs(module, checkpoint, args.shape)
    models = ServedModels(module, checkpoint, args.canary, share)
    print(
        f"{type(module).__name__} of {checkpoint}, round {models.current.round}: http://{args.host}:{args.port}/predict",
        flush=True,
    )
    api = ModelAPI(
        checkpoint,
        args.module,
        args.shape,
        args.clients,
        args.watch,
        args.canary,
        0.0 if args.canary is None else share,
        args.base,
    )
    serve(api, args.host, args.port, args.workers, args.max_requests or MAX_REQUESTS)
