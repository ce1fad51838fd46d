"""From the flags of serve.py to a running service: in one process under uvicorn, or under Ray Serve."""
import argparse

import uvicorn

from serving.cluster import application, serve_replicas
from serving.engine import Engine
from serving.keys import new_key
from serving.settings import EngineSettings, ServiceSettings


def start(options: argparse.Namespace) -> None:
    """Make a key, or serve until it is stopped."""
    if options.new_key:
        print(new_key(options.keys, options.new_key))
        return
    threads = options.threads or (1 if options.replicas else 0)
    engine = EngineSettings(options.run, options.batch, threads, options.speed, options.moderation, options.concepts,
                            options.clip, tuple(options.audit))
    service = ServiceSettings(options.replicas or 1, options.batch, options.queue, options.timeout, options.keep,
                              keys=options.keys, page=options.page)
    if options.replicas:
        serve_replicas(engine, service, options.host, options.port, options.replicas)
        return
    app = application(Engine(engine), service)
    print(f"{options.host}:{options.port}: /v1/images/generations{', the page at /' if options.page else ''}",
          flush=True)
    uvicorn.run(app, host=options.host, port=options.port, access_log=False, log_level="warning",
                timeout_graceful_shutdown=30)
