"""`Exchange`: one client's request, over as many upstreams as its answer takes.

Invariants: the receiver hears of one response, whatever became of the upstreams before. As long as no byte of an answer has
left the gateway, a request that fails goes to another upstream, whole; an answer that is no stream leaves when all of it has
come, so that holds for it up to its end. A stream goes on with another one from what has left. A kept connection that turns
out to be closed before it answered is replaced once; when the client leaves, the connection to the upstream is closed at once,
which is how such servers learn to stop. It ignores what the bytes mean.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from chaccu.serve.gateway.errors import upstream_lost, upstreams_unreachable
from chaccu.serve.gateway.upstreams.answer_receiver import AnswerReceiver
from chaccu.serve.gateway.upstreams.connection import ResponseHead, UpstreamConnection
from chaccu.serve.gateway.upstreams.event_lines import is_json
from chaccu.serve.gateway.upstreams.kept_stream import KeptStream
from chaccu.serve.gateway.upstreams.pool import UpstreamPool
from chaccu.serve.gateway.upstreams.sent_stream import CannotContinueError
from chaccu.serve.gateway.upstreams.server import UpstreamServer
from chaccu.serve.gateway.upstreams.stall_watch import SilenceLimits, StallWatch

# A whole answer that is longer passes as it comes.
_MAX_HELD_BYTES = 2**20
_OK = 200
# What servers and the proxies before them say when they start, end, or are not there.
_NOT_SERVING = frozenset({502, 503, 504})
_REFUSED = frozenset({400, 422})


class Exchange:
    """Made by `UpstreamRelay.start`; `on_tried` gets the URL of each upstream that is asked, `on_end(exchange)` is called when
    it has ended."""

    def __init__(
        self,
        pool: UpstreamPool,
        endpoint: str,
        body: bytes,
        receiver: AnswerReceiver,
        headers: bytes,
        on_tried: Callable[[str], None],
        on_end: Callable[[Exchange], None],
    ) -> None:
        self._pool = pool
        self._endpoint = endpoint
        self._body = body
        self._receiver = receiver
        self._headers = headers
        self._on_tried = on_tried
        self._on_end = on_end
        # The present upstream, and what it is asked.
        self._server: UpstreamServer | None = None
        self._connection: UpstreamConnection | None = None
        self._request = b""
        self._replaced = False
        self._task: asyncio.Task[None] | None = None
        self._paused = False
        # What became of those before.
        self._failed: tuple[UpstreamServer, ...] = ()
        self._losses = 0
        self._give_up_at_s: float | None = None
        self._refusal: tuple[ResponseHead, bytes] | None = None
        # What has come: a whole answer that is held, or a stream.
        self._head: ResponseHead | None = None
        self._held: list[bytes] | None = None
        self._held_bytes = 0
        self._began = False
        self._stream: KeptStream | None = None
        self._continues = self._is_prefix = False
        self._watch = StallWatch()
        self._probing: asyncio.Task[None] | None = None

    # What the owner does.

    def start(self) -> None:
        self._try()

    def cancel(self) -> None:
        """Nobody waits for the answer: the upstream learns it at once, the receiver hears nothing more."""
        if self._task is not None:
            self._task.cancel()
        self._leave()
        self._on_end(self)

    def pause(self) -> None:
        """The client does not keep up."""
        self._paused = True
        if self._connection is not None:
            self._connection.pause()

    def resume(self) -> None:
        """The client has caught up."""
        self._paused = False
        if self._connection is not None:
            self._connection.resume()

    def check_stall(self, now_s: float, limits: SilenceLimits) -> None:
        """Give the upstream up where a limit is reached and another one can take its place: one whose stream stands still, or
        that has said nothing yet and does not answer a probe either.
        """
        stream, server, connection = self._stream, self._server, self._connection
        if server is None or connection is None or self._paused:
            self._watch.reset()
        elif stream is not None:
            # A call of a tool may be silent for long, and is not cut for it.
            if self._watch.is_over(stream.came_bytes, now_s, limits.in_stream_s) and stream.can_go_on:
                self._lose_to_another(server, limits.in_stream_s)
        elif self._head is None and self._watch.is_over(connection, now_s, limits.before_answer_s):
            # A whole answer may take long to be written: silence alone says nothing.
            self._probing = asyncio.ensure_future(self._lose_if_frozen(server, connection, limits.before_answer_s))

    async def _lose_if_frozen(self, server: UpstreamServer, connection: UpstreamConnection, silent_s: float) -> None:
        answers = await server.answers()
        if not answers and self._connection is connection and self._head is None:
            self._lose_to_another(server, silent_s)

    def _lose_to_another(self, server: UpstreamServer, silent_s: float) -> None:
        if self._pool.choose((server,)) is not server:
            self._lose(f"nothing came for {silent_s:g} s")

    # As the connection's receiver.

    def begin(self, head: ResponseHead) -> None:
        if self._continues:
            self._begin_again(head)
            return
        self._head = head
        self._request = b""
        if head.status != _OK or head.is_whole:
            self._held = []
            self._held_bytes = 0
            return
        if head.is_event_stream:
            self._stream = KeptStream(self._endpoint, self._body)
        self._begin(head)

    def deliver(self, body: bytes) -> None:
        if self._held is not None:
            self._hold(body)
            return
        if self._stream is not None:
            try:
                body = self._stream.take(body)
            except CannotContinueError as error:
                self._break_off(error)
                return
            if self._continues and not body:
                return
        self._receiver.deliver(body)

    def finish(self, body: bytes) -> None:
        self._connection = None
        head, held, stream = self._head, self._held, self._stream
        assert head is not None
        if held is not None:
            held.append(body)
            body = b"".join(held)
            if head.ends_by_close and not is_json(body):
                self._lose("it broke off an answer")
            else:
                self._finish_whole(head, body)
            return
        if stream is not None:
            try:
                body = stream.finish(body)
            except CannotContinueError as error:
                self._break_off(error)
                return
            if head.ends_by_close and not stream.is_done:
                self._receiver.deliver(body)
                self._lose("it broke off an answer")
                return
        self._end()
        self._receiver.finish(body)

    def fail(self, *, began: bool) -> None:
        kept = self._connection is not None and self._connection.answered > 0
        self._connection = None
        if kept and not began and not self._replaced:
            # Most likely the upstream closed an idle connection while the request was on its way.
            self._replaced = True
            self._connect()
            return
        self._lose("it broke off an answer" if began else "it closed the connection")

    # The way to an upstream.

    def _try(self) -> None:
        server = self._pool.choose(self._failed)
        if server is None:
            self._task = asyncio.ensure_future(self._wait())
            return
        if self._is_prefix and not server.continues:
            self._ask_without_prefix()
            return
        self._server = server
        server.take_on()
        self._on_tried(server.shown_url)
        self._request = server.write_request(self._endpoint, self._body, self._headers)
        self._replaced = False
        connection = server.take()
        if connection is None:
            self._connect()
        else:
            self._use(connection)

    async def _wait(self) -> None:
        if self._give_up_at_s is None:
            self._give_up_at_s = asyncio.get_running_loop().time() + self._pool.wait_s
        try:
            async with asyncio.timeout_at(self._give_up_at_s):
                while self._pool.choose(()) is None:
                    await self._pool.wait_ready()
        except TimeoutError:
            self._task = None
            self._give_up()
            return
        self._task = None
        self._try()

    def _connect(self) -> None:
        assert self._server is not None
        self._task = asyncio.ensure_future(self._connect_and_use(self._server))

    async def _connect_and_use(self, server: UpstreamServer) -> None:
        try:
            connection = await server.connect()
        except (OSError, TimeoutError, UnicodeError):
            self._task = None
            self._pass_over("it cannot be reached")
            return
        self._task = None
        self._use(connection)

    def _use(self, connection: UpstreamConnection) -> None:
        self._connection = connection
        connection.send(self._request, self)
        if self._paused:
            connection.pause()

    def _leave(self) -> None:
        """Have no upstream any more."""
        connection, self._connection = self._connection, None
        server, self._server = self._server, None
        if connection is not None:
            connection.abort()
        if server is not None:
            server.let_go()

    # What has come, and what becomes of it.

    def _begin(self, head: ResponseHead) -> None:
        assert self._server is not None
        self._began = True
        self._give_up_at_s = None
        self._server.succeed()
        self._receiver.begin(head)

    def _hold(self, body: bytes) -> None:
        assert self._held is not None
        assert self._head is not None
        self._held.append(body)
        self._held_bytes += len(body)
        if self._held_bytes > _MAX_HELD_BYTES:
            body = b"".join(self._held)
            self._held = None
            self._begin(self._head)
            self._receiver.deliver(body)

    def _finish_whole(self, head: ResponseHead, body: bytes) -> None:
        assert self._server is not None
        self._held = None
        if head.status in _NOT_SERVING:
            self._refusal = head, body
            self._pass_over(f"it answered with status {head.status}")
            return
        self._begin(head)
        self._end()
        self._receiver.finish(body)

    def _lose(self, why: str) -> None:
        """The present upstream had the request and did not answer it, or not to the end."""
        self._losses += 1
        self._pass_over(why)

    def _pass_over(self, why: str) -> None:
        """The present upstream does not answer."""
        assert self._server is not None
        self._server.fail(why)
        self._go_on()

    def _go_on(self) -> None:
        """On to the next upstream."""
        assert self._server is not None
        self._failed = (*self._failed, self._server)
        self._leave()
        self._held = None
        if self._began:
            self._continue()
        else:
            self._head = None
            self._try_if_it_may()

    def _try_if_it_may(self) -> None:
        if self._losses >= self._pool.max_attempts:
            self._give_up()
        else:
            self._try()

    def _end(self) -> None:
        self._leave()
        self._on_end(self)

    def _give_up(self) -> None:
        """No upstream answers."""
        pool = self._pool
        waited = self._give_up_at_s is not None and self._losses < pool.max_attempts
        lost_all = f"{self._losses} upstreams in turn were lost with it"
        self._on_end(self)
        if self._began:
            self._receiver.fail(
                upstream_lost(pool.model, f"no other was there within {pool.wait_s:g} s" if waited else lost_all)
            )
        elif self._refusal is not None:
            head, body = self._refusal
            self._receiver.begin(head)
            self._receiver.finish(body)
        elif self._losses and not waited:
            self._receiver.fail(upstream_lost(pool.model, lost_all))
        else:
            self._receiver.fail(upstreams_unreachable(pool.model, len(pool.servers), pool.wait_s))

    def _break_off(self, error: CannotContinueError) -> None:
        """The stream cannot go on."""
        self._end()
        self._receiver.fail(upstream_lost(self._pool.model, error.message))

    # Going on with a stream.

    def _continue(self) -> None:
        """Ask the next upstream for the rest of what the client has."""
        stream = self._stream
        try:
            if stream is None:
                raise CannotContinueError("a part of it has left the gateway")
            plan = stream.plan()
            stream.go_on(plan)
        except CannotContinueError as error:
            self._break_off(error)
            return
        if plan.body is None:
            self._on_end(self)
            self._receiver.finish(plan.opening)
            return
        self._continues = True
        self._is_prefix = plan.is_prefix
        self._body = plan.body
        if plan.opening:
            self._receiver.deliver(plan.opening)
        self._try_if_it_may()

    def _ask_without_prefix(self) -> None:
        """The next upstream does not go on from a text."""
        assert self._stream is not None
        self._is_prefix = False
        self._stream.refuse_prefix()
        self._continue()

    def _begin_again(self, head: ResponseHead) -> None:
        """The head of an answer that is to go on with the stream."""
        assert self._server is not None
        if head.status == _OK and head.is_event_stream:
            self._head = head
            self._give_up_at_s = None
            self._server.succeed(continued=True)
            self._pool.on_continue()
        elif head.status in _REFUSED and self._is_prefix:
            self._leave()
            self._ask_without_prefix()
        elif head.status in _NOT_SERVING:
            self._pass_over(f"it answered with status {head.status}")
        else:
            # It serves, but not this.
            self._losses += 1
            self._go_on()
