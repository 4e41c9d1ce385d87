"""`gr serve`: recommendations over HTTP.

Every answer that is not 200 is {"error": ...}: what was expected, what was found, what to do. /docs
shows the OpenAPI description, which is made of the columns that the run reads.
"""

import asyncio
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
)
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gr import parallel
from gr.config import TrainConfig
from gr.inference.batching import Batcher, ClosingError, QueueFullError
from gr.inference.beam import FoundSequence, SequenceQuestion, beam_search
from gr.inference.engine import Question, Recommendation, Recommender, load_recommender
from gr.inference.schemas import Added, Answer, Health, Problem, SequencesAnswer, UserState
from gr.inference.wire import Translator, UnknownUserError
from gr.parallel import World
from gr.serve_config import ServeConfig
from pipelines.history import TIMESTAMP

PROBLEMS: dict[int | str, dict[str, Any]] = {
    400: {"model": Problem, "description": "The body is no JSON"},
    404: {"model": Problem, "description": "Nothing is known of the user"},
    413: {"model": Problem, "description": "The body is too large"},
    422: {"model": Problem, "description": "The request cannot be answered as it is"},
    429: {"model": Problem, "description": "Too many requests wait: try again later"},
    503: {"model": Problem, "description": "The server is stopping"},
    504: {"model": Problem, "description": "It took too long"},
}
QUESTION_PATHS = ("/recommend", "/sequences")
_MOST_ERRORS = 5
_SWITCH_INTERVAL_S = 1e-4
_REFUSAL_S = 0.25
"""After which a client that was refused hears of it."""


class Meters:
    """What /metrics shows."""

    def __init__(self, recommender: Recommender, batcher: Batcher[Any, Any]) -> None:
        registry = self.registry = CollectorRegistry()
        self.requests = Counter(
            "gr_requests", "Requests by path and status.", ["path", "status"], registry=registry
        )
        self.seconds = Histogram(
            "gr_request_seconds",
            "Time from request to answer.",
            ["path"],
            buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10),
            registry=registry,
        )
        self.batch = Histogram(
            "gr_batch_requests",
            "Requests that were answered together.",
            buckets=(1, 2, 4, 8, 16, 32, 64, 128),
            registry=registry,
        )
        self.items = Counter("gr_items", "Items that were scored or found.", registry=registry)
        waiting = Gauge("gr_waiting_requests", "Requests that wait for a batch.", registry=registry)
        waiting.set_function(lambda: batcher.num_waiting)
        users = Gauge("gr_users", "Users whose history is known.", registry=registry)
        users.set_function(lambda: recommender.store.num_users)
        Gauge("gr_checkpoint_step", "Step of the checkpoint.", registry=registry).set(
            recommender.step
        )


class BodyLimit:
    """Refuses bodies of more bytes before they are all read.

    Args:
        app: what is behind it.
        most: bytes.
    """

    def __init__(self, app: ASGIApp, most: int) -> None:
        self.app, self.most = app, most

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        length = dict(scope["headers"]).get(b"content-length", b"0")
        if length.isdigit() and int(length) > self.most:
            await _problem(413, self._text)(scope, receive, send)
            return
        num_bytes = 0

        async def limited() -> Message:
            nonlocal num_bytes
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if num_bytes > self.most:
                raise HTTPException(413, self._text)
            return message

        await self.app(scope, limited, send)

    @property
    def _text(self) -> str:
        return (
            f"a body may have {self.most:,} bytes: send fewer candidates or events at a time, or "
            "start the server with a larger --max-body-mb"
        )


class QueueGate:
    """Refuses questions before their bodies are read, while as many wait as may.

    Refusing must cost little, and takes its time: clients that ask again at once would otherwise
    leave the thread of answers no turn.

    Args:
        app: what is behind it.
        batcher: whose queue it is.
        refusals: counts them, by path and status.
    """

    def __init__(self, app: ASGIApp, batcher: Batcher[Any, Any], refusals: Counter) -> None:
        self.app, self.batcher, self.refusals = app, batcher, refusals

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on."""
        path = scope.get("path")
        if scope["type"] == "http" and path in QUESTION_PATHS and self.batcher.is_full:
            self.refusals.labels(path, "429").inc()
            await asyncio.sleep(_REFUSAL_S)
            await _too_many(self.batcher.max_queue)(scope, receive, send)
            return
        await self.app(scope, receive, send)


def build_app(recommender: Recommender, config: ServeConfig) -> FastAPI:
    """Return the application.

    Args:
        recommender: answers.
        config: bounds.
    """
    translator = Translator(recommender, config)
    batcher: Batcher[Any, Any] = Batcher(
        lambda questions: answers(recommender, questions),
        window_s=config.window_ms / 1000,
        max_batch=config.max_batch,
        max_queue=config.max_queue,
        timeout_s=config.timeout_s,
        on_batch=lambda size: meters.batch.observe(size),
    )
    meters = Meters(recommender, batcher)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        batcher.start()
        yield
        await batcher.close()

    app = FastAPI(
        title="gr",
        summary="Recommendations by a generative recommender",
        version=f"step {recommender.step}",
        lifespan=lifespan,
    )
    app.state.batcher = batcher
    app.add_middleware(BodyLimit, most=int(config.max_body_mb * 1e6))
    _add_handlers(app, config)

    @app.middleware("http")
    async def measured(
        request: Request, call_next: Callable[[Request], Awaitable[Response]]
    ) -> Response:
        start = time.perf_counter()
        response = await call_next(request)
        route = request.scope.get("route")
        path = getattr(route, "path", "other")  # not the text that was asked for: it is unbounded
        meters.requests.labels(path, str(response.status_code)).inc()
        meters.seconds.labels(path).observe(time.perf_counter() - start)
        return response

    # The last one added is the first one asked.
    app.add_middleware(QueueGate, batcher=batcher, refusals=meters.requests)

    question_model, events_model = translator.schemas.question, translator.schemas.events
    sequences_model = translator.schemas.sequences

    @app.post("/recommend", response_model=Answer, responses=PROBLEMS)
    async def recommend(body: question_model) -> Response:  # type: ignore[valid-type]
        """Score candidates, or find items and rank them, with one checkpoint."""
        batcher.require_room()  # before the work of encoding a request that is refused
        question = translator.question(body, int(time.time()))
        found = await batcher.ask(question)
        meters.items.inc(len(found.item_ids))
        # Written at once: FastAPI would check each of the items a second time.
        text = translator.answer(question, found).model_dump_json()
        return Response(text, media_type="application/json")

    @app.post("/sequences", response_model=SequencesAnswer, responses=PROBLEMS)
    async def sequences(body: sequences_model) -> SequencesAnswer:  # type: ignore[valid-type]
        """Say which items come next, several steps ahead, by beam search."""
        batcher.require_room()
        question = translator.sequence_question(body, int(time.time()))
        found = await batcher.ask(question)
        meters.items.inc(sum(len(x.item_ids) for x in found))
        return translator.sequences_answer(question, found)

    @app.post("/events", response_model=Added, responses=PROBLEMS)
    async def events(body: events_model) -> Added:  # type: ignore[valid-type]
        """Add events to a user's history. They are in memory only: the log stays as it is."""
        return translator.add(body)

    @app.get("/users/{user_id}", response_model=UserState, responses=PROBLEMS)
    async def user(user_id: int) -> UserState:
        """Return what is known of a user."""
        history = None
        if -(2**63) <= user_id < 2**63:
            history = recommender.store.history(user_id)
        if history is None:
            raise UnknownUserError(f"nothing is known of user {user_id}")
        times = history.ints[:, TIMESTAMP]
        return UserState(
            user_id=user_id,
            history_events=len(times),
            newest_timestamp=int(times[-1]) if len(times) else None,
        )

    @app.get("/health", response_model=Health, responses={503: PROBLEMS[503]})
    async def health() -> Health:
        """Say that the server answers."""
        if batcher.is_closing:
            raise ClosingError
        return Health(
            status="ok",
            checkpoint_step=recommender.step,
            users=recommender.store.num_users,
            items=len(recommender.catalogue.ids) if recommender.catalogue else 0,
            tasks=list(recommender.tasks),
            waiting=batcher.num_waiting,
        )

    @app.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    async def metrics() -> Response:
        """Return counts and times as Prometheus reads them."""
        return Response(generate_latest(meters.registry), media_type=CONTENT_TYPE_LATEST)

    return app


def answers(
    recommender: Recommender, questions: Sequence[Question | SequenceQuestion]
) -> list[Recommendation | list[FoundSequence]]:
    """Answer questions of both kinds: those for items together, those for sequences in turn."""
    plain = [x for x in questions if isinstance(x, Question)]
    found = iter(recommender.answer(plain) if plain else [])
    return [
        beam_search(recommender, x) if isinstance(x, SequenceQuestion) else next(found)
        for x in questions
    ]


def _add_handlers(app: FastAPI, config: ServeConfig) -> None:
    @app.exception_handler(RequestValidationError)
    async def not_valid(_: Request, error: RequestValidationError) -> JSONResponse:
        found = error.errors()
        if any(x["type"] == "json_invalid" for x in found):
            return _problem(400, f"the body is no JSON: {found[0]['ctx']['error']}")
        # Without the input: it may be large, or hold what JSON cannot.
        lines = [f"{'.'.join(map(str, x['loc']))}: {x['msg']}" for x in found[:_MOST_ERRORS]]
        if len(found) > _MOST_ERRORS:
            lines.append(f"and {len(found) - _MOST_ERRORS} more")
        return _problem(422, "; ".join(lines))

    @app.exception_handler(HTTPException)
    async def refused(_: Request, error: HTTPException) -> JSONResponse:
        return _problem(error.status_code, error.detail)

    @app.exception_handler(UnknownUserError)
    async def unknown_user(_: Request, error: UnknownUserError) -> JSONResponse:
        return _problem(404, str(error))

    @app.exception_handler(ValueError)
    async def wrong(_: Request, error: ValueError) -> JSONResponse:
        return _problem(422, str(error))

    @app.exception_handler(QueueFullError)
    async def full(_: Request, __: QueueFullError) -> JSONResponse:
        return _too_many(config.max_queue)

    @app.exception_handler(TimeoutError)
    async def late(_: Request, __: TimeoutError) -> JSONResponse:
        return _problem(504, f"no answer within {config.timeout_s:g} s: ask for fewer candidates")

    @app.exception_handler(ClosingError)
    async def closing(_: Request, __: ClosingError) -> JSONResponse:
        return _problem(503, "the server is stopping", {"Retry-After": "5"})

    @app.exception_handler(Exception)
    async def defect(_: Request, __: Exception) -> JSONResponse:
        return _problem(500, "a defect of the server: its log has the traceback")


def _too_many(max_queue: int) -> JSONResponse:
    text = f"{max_queue} requests wait already: try again later"
    return _problem(429, text, {"Retry-After": "1"})


def _problem(status: int, text: str, headers: dict[str, str] | None = None) -> JSONResponse:
    return JSONResponse({"error": text}, status, headers=headers)


def serve(
    config: TrainConfig, run_dir: str, serve_config: ServeConfig, *, step: int | None = None
) -> None:
    """Serve a run until SIGINT or SIGTERM; requests that wait are answered before it ends.

    Args:
        config: `gr.evaluate.run_config` of the run.
        run_dir: the run directory.
        serve_config: address and bounds.
        step: of the checkpoint; None means the newest.

    Raises:
        ValueError: if the checkpoint or the log cannot be used.
    """
    world = parallel.start(
        config.device,
        needs_group=config.embeddings.form == "sharded",
        timeout_minutes=config.timeout_minutes,
    )
    try:
        if world.size > 1:
            raise ValueError("gr serve is one process: start it without torchrun")
        recommender = load_recommender(
            config,
            run_dir,
            world=world,
            step=step,
            faiss=serve_config.faiss,
            cache_bytes=int(serve_config.cache_mb * 1e6),
            tables=serve_config.tables,
        )
        with _listening(serve_config) as listener:
            _run(recommender, serve_config, world, listener)
    finally:
        parallel.stop(world)


def _run(
    recommender: Recommender, config: ServeConfig, world: World, listener: socket.socket
) -> None:
    port = listener.getsockname()[1]
    store, catalogue = recommender.store, recommender.catalogue
    items = f"{len(catalogue.ids):,} items" if catalogue else "no retrieval"
    sys.stderr.write(
        f"step {recommender.step} on {world.device.type}: {items}, {store.num_users:,} users with "
        f"{store.num_events:,} events; http://{config.host}:{port}/docs\n"
    )
    sys.stderr.flush()
    settings = uvicorn.Config(
        build_app(recommender, config),
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=max(1, round(config.timeout_s)),
    )
    with _quick_turns():
        _Server(settings).run(sockets=[listener])


@contextmanager
def _quick_turns() -> Iterator[None]:
    """Let the thread of answers have the interpreter soon, however many requests are refused.

    It asks for the interpreter after each operator of torch, and by default waits 5 ms for a
    thread that is busy: a server that refuses a thousand requests a second answered none.
    """
    before = sys.getswitchinterval()
    sys.setswitchinterval(_SWITCH_INTERVAL_S)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


class _Server(uvicorn.Server):
    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Stop when asked to, with exit status 0: uvicorn raises the signal again at the end."""
        asked = (signal.SIGINT, signal.SIGTERM)
        before = {each: signal.signal(each, self.handle_exit) for each in asked}
        try:
            yield
        finally:
            for each, handler in before.items():
                signal.signal(each, handler)


def _listening(config: ServeConfig) -> socket.socket:
    """Return a socket at the address; a wrong one is found before anything is promised.

    Raises:
        ValueError: if the address cannot be had.
    """
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    # Named TCP: asyncio spares sockets that are Nagle's delay, which was 40 ms an answer.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((config.host, config.port))
        listener.listen(2048)
    except OSError as error:
        listener.close()
        raise ValueError(
            f"cannot listen at {config.host} port {config.port}: {error.strerror}. Give another "
            "--host or --port"
        ) from error
    return listener
