"""Routes, the headers of every answer, and errors as pages."""

from __future__ import annotations

import logging
import re
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import parse_qs, quote, urlsplit

import grpc
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from modelpress_protos.printable import printable
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, RedirectResponse, Response, StreamingResponse
from starlette.routing import Route

from modelpress_server import errors
from modelpress_server.clock import Clock
from modelpress_server.config import LOOPBACK_HOSTS, Settings
from modelpress_server.console import figures, pages
from modelpress_server.console.live import Live
from modelpress_server.console.sessions import CALLBACK, LIFE_S, PENDING_S, Sessions
from modelpress_server.console.visitor import Services, Visitor
from modelpress_server.identity.authenticator import Authenticator
from modelpress_server.identity.roles import Caller

if TYPE_CHECKING:
    from modelpress_server.console.oidc import Provider

logger = logging.getLogger(__name__)

ROOT = "/console"
SIGN_IN = f"{ROOT}/sign-in"
PROVIDER = f"{SIGN_IN}/provider"
MAX_FORM_BYTES = 32 * 1024
BEGUN = "-begun"  # of the cookie of a sign-in that is under way
LAYOUT = "\n\u00a0"  # what is not printable and stays: line ends, and the space before a unit
_HERE = Path(__file__).parent
_STATIC = {"console.css": "text/css; charset=utf-8", "live.js": "text/javascript; charset=utf-8"}
_NEXT = re.compile(rf"{ROOT}(?:/[A-Za-z0-9_-]+)*(?:\?[A-Za-z0-9_=&%.~-]*)?")
HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
        "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
    ),
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}
# A report was written by a worker that had read a stranger's model: it gets an origin of its own, and runs nothing.
REPORT_POLICY = "sandbox; default-src 'none'; style-src 'unsafe-inline'; img-src data:; frame-ancestors 'none'"
_STATUS = {
    grpc.StatusCode.NOT_FOUND: 404,
    grpc.StatusCode.PERMISSION_DENIED: 403,
    grpc.StatusCode.UNAUTHENTICATED: 401,
    grpc.StatusCode.INVALID_ARGUMENT: 400,
    grpc.StatusCode.RESOURCE_EXHAUSTED: 429,
    grpc.StatusCode.UNAVAILABLE: 503,
}
Page = Callable[[Request, Visitor], Awaitable[Response]]


class Console:
    """The pages of one server."""

    def __init__(self, settings: Settings, authenticator: Authenticator, services: Services, clock: Clock) -> None:
        self._settings = settings
        self._authenticator = authenticator
        self._services = services
        self._sessions = Sessions(clock)
        self._provider: Provider | None = None
        if settings.console_client_id is not None:
            from modelpress_server.console.oidc import Provider

            self._provider = Provider(settings, clock)
        self._live = Live()
        self._static = {name: (_HERE / "static" / name).read_bytes() for name in _STATIC}
        self._templates = Environment(
            loader=FileSystemLoader(_HERE / "templates"),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
            finalize=_shown,
        )
        self._templates.filters.update(size=figures.size, number=figures.number, duration=figures.duration)

    def routes(self) -> list[Route]:
        """For the application that serves them."""
        job = f"{ROOT}/projects/{{project}}/jobs/{{job}}"
        return [
            Route(f"{ROOT}/", self._home),
            Route(SIGN_IN, self._sign_in, methods=["GET", "POST"]),
            Route(PROVIDER, self._to_provider),
            Route(CALLBACK, self._from_provider),
            Route(f"{ROOT}/sign-out", self._sign_out, methods=["POST"]),
            Route(f"{ROOT}/static/{{name}}", self._file),
            Route(ROOT, self._page(self._projects)),
            Route(f"{ROOT}/queue", self._page(self._queue)),
            Route(f"{ROOT}/compare", self._page(self._compare)),
            Route(f"{ROOT}/projects/{{project}}", self._page(self._project)),
            Route(job, self._page(self._job)),
            Route(f"{job}/report", self._page(self._report)),
            Route(f"{job}/events", self._page(self._events)),
        ]

    # --- pages -------------------------------------------------------------------------------------------------------

    async def _projects(self, request: Request, visitor: Visitor) -> Response:
        return self._render("projects.html", visitor, await pages.projects(visitor))

    async def _queue(self, request: Request, visitor: Visitor) -> Response:
        return self._render("queue.html", visitor, await pages.queue(visitor))

    async def _project(self, request: Request, visitor: Visitor) -> Response:
        query = request.query_params
        found = await pages.project(
            visitor, request.path_params["project"], query.get("state", ""), query.get("page", "")
        )
        return self._render("project.html", visitor, found)

    async def _job(self, request: Request, visitor: Visitor) -> Response:
        found = await pages.job(visitor, request.path_params["project"], request.path_params["job"])
        return self._render("job.html", visitor, found)

    async def _compare(self, request: Request, visitor: Visitor) -> Response:
        return self._render("compare.html", visitor, await pages.compare(visitor, request.query_params.getlist("job")))

    async def _report(self, request: Request, visitor: Visitor) -> Response:
        project = request.path_params["project"]
        artifact = await pages.report_of(visitor, project, request.path_params["job"])
        content = visitor.read(project, artifact.files[0].digest)
        headers = {**HEADERS, "Content-Security-Policy": REPORT_POLICY}
        return StreamingResponse(content, media_type="text/html; charset=utf-8", headers=headers)

    async def _events(self, request: Request, visitor: Visitor) -> Response:
        name = f"projects/{request.path_params['project']}/jobs/{request.path_params['job']}"
        return await self._live.job(visitor, name)

    async def _home(self, request: Request) -> Response:
        return RedirectResponse(ROOT, 308, headers=HEADERS)

    async def _file(self, request: Request) -> Response:
        name = request.path_params["name"]
        if name not in self._static:
            return self._failure(None, 404, "There is no such page.")
        headers = {**HEADERS, "Cache-Control": "no-cache"}
        return Response(self._static[name], media_type=_STATIC[name], headers=headers)

    # --- who looks ---------------------------------------------------------------------------------------------------

    def _page(self, page: Page) -> Callable[[Request], Awaitable[Response]]:
        async def answer(request: Request) -> Response:
            visitor = None
            try:
                visitor = await self._visitor(request)
                response = await page(request, visitor)
            except errors.UnauthenticatedError:
                return self._to_sign_in(request)
            except errors.ServiceError as error:
                return self._failure(visitor, _STATUS.get(errors.code_of(error), 500), str(error))
            except Exception as error:  # as of a call: a number for the user, the rest for the log
                internal = errors.InternalError()
                logger.error("incident %s in the console", internal.incident, exc_info=error)
                return self._failure(visitor, 500, str(internal))
            for name, value in HEADERS.items():
                response.headers.setdefault(name, value)
            return response

        return answer

    async def _visitor(self, request: Request) -> Visitor:
        """Raises UnauthenticatedError, TooManyAttemptsError, PermissionDeniedError."""
        self._check_door(request)
        authorization, known = request.headers.get("authorization", ""), False
        if not authorization:
            token = self._sessions.token(request.cookies.get(self._cookie(request), ""))
            authorization, known = f"Bearer {token}" if token else "", bool(token)
        peer = _peer(request)

        async def renew() -> Caller:
            return await self._authenticator.caller(authorization, peer, known=True)

        caller = await self._authenticator.caller(authorization, peer, known=known)
        return Visitor(self._services, caller, peer, renew)

    def _check_door(self, request: Request) -> None:
        """Where nobody has to sign in, only this machine's own pages may look.

        Raises PermissionDeniedError.
        """
        settings = self._settings
        if settings.asks_for_tokens:
            return
        if settings.authenticates:
            raise errors.PermissionDeniedError(
                "This server knows its callers by certificates, which browsers are not asked for here. Make a token: "
                "compress-server token add NAME."
            )
        # A page of another site, whose name was made to point here, would send that name (DNS rebinding).
        host = urlsplit(f"//{request.headers.get('host', '')}").hostname or ""
        if settings.http_host in LOOPBACK_HOSTS and host not in LOOPBACK_HOSTS:
            raise errors.PermissionDeniedError(f"Ask for {ROOT} at one of {', '.join(LOOPBACK_HOSTS)}.")

    def _to_sign_in(self, request: Request) -> Response:
        if request.method != "GET" or request.url.path.endswith("/events"):
            return self._failure(None, 401, "Sign in first.")
        target = request.url.path + (f"?{request.url.query}" if request.url.query else "")
        return RedirectResponse(f"{SIGN_IN}?next={quote(_inside(target), safe='')}", 303, headers=HEADERS)

    async def _sign_in(self, request: Request) -> Response:
        if request.method == "GET":
            return self._sign_in_page(request.query_params.get("next", ""))
        try:
            self._check_door(request)
            form = await _form(request)
        except errors.ServiceError as error:
            return self._failure(None, _STATUS.get(errors.code_of(error), 500), str(error))
        token, target = form.get("token", "").strip(), _inside(form.get("next", ""))
        try:
            await self._authenticator.caller(f"Bearer {token}", _peer(request))
        except errors.UnauthenticatedError:
            return self._sign_in_page(target, "This token is not known here, or holds no longer.", 401)
        except errors.ServiceError as error:
            return self._sign_in_page(target, str(error), _STATUS.get(errors.code_of(error), 500))
        response = RedirectResponse(target, 303, headers=HEADERS)
        self._set_cookie(response, request, "", self._sessions.begin(token), LIFE_S, "strict")
        return response

    async def _to_provider(self, request: Request) -> Response:
        if self._provider is None:
            return self._failure(None, 404, "There is no such page.")
        target = _inside(request.query_params.get("next", ""))
        try:
            url, key = await self._provider.begin(target)
        except errors.UnauthenticatedError as error:
            return self._sign_in_page(target, str(error), 503)
        response = RedirectResponse(url, 303, headers=HEADERS)
        self._set_cookie(response, request, BEGUN, key, PENDING_S, "lax")
        return response

    async def _from_provider(self, request: Request) -> Response:
        if self._provider is None:
            return self._failure(None, 404, "There is no such page.")
        try:
            token, target = await self._provider.finish(
                request.cookies.get(self._cookie(request, BEGUN), ""), request.query_params
            )
        except errors.UnauthenticatedError as error:
            return self._sign_in_page(ROOT, str(error), 401)
        try:
            # No guess: the provider gave it to us just now.
            await self._authenticator.caller(f"Bearer {token}", _peer(request), known=True)
        except errors.UnauthenticatedError:
            return self._sign_in_page(ROOT, "The provider's token does not hold here.", 401)
        response = RedirectResponse(_inside(target), 303, headers=HEADERS)
        # Lax: the page that follows is still one that the provider's site has led to.
        self._set_cookie(response, request, "", self._sessions.begin(token), LIFE_S, "lax")
        self._delete_cookie(response, request, BEGUN)
        return response

    async def _sign_out(self, request: Request) -> Response:
        try:
            await _form(request)
        except errors.ServiceError as error:
            return self._failure(None, 403, str(error))
        self._sessions.end(request.cookies.get(self._cookie(request), ""))
        response = RedirectResponse(SIGN_IN, 303, headers=HEADERS)
        self._delete_cookie(response, request, "")
        return response

    def _encrypted(self, request: Request) -> bool:
        """Whether a browser speaks TLS, to this server or to a proxy before it."""
        return "https" in (request.url.scheme, urlsplit(self._settings.console_url or "").scheme)

    def _cookie(self, request: Request, suffix: str = "") -> str:
        """Browsers take a cookie with __Host- over TLS only, and from no other host."""
        return f"{'__Host-' if self._encrypted(request) else ''}modelpress-console{suffix}"

    def _set_cookie(
        self,
        response: Response,
        request: Request,
        suffix: str,
        value: str,
        life_s: float,
        same_site: Literal["lax", "strict"],
    ) -> None:
        response.set_cookie(
            self._cookie(request, suffix),
            value,
            max_age=int(life_s),
            path="/",  # a name with __Host- asks for it
            secure=self._encrypted(request),
            httponly=True,
            samesite=same_site,
        )

    def _delete_cookie(self, response: Response, request: Request, suffix: str) -> None:
        name = self._cookie(request, suffix)
        response.delete_cookie(name, path="/", secure=self._encrypted(request), httponly=True)

    # --- answers -----------------------------------------------------------------------------------------------------

    def _sign_in_page(self, target: str, fault: str = "", status: int = 200) -> Response:
        following = _inside(target)
        found = {
            "next": following,
            "fault": fault,
            "web_tokens": self._settings.jwt_issuer is not None,
            "provider": f"{PROVIDER}?next={quote(following, safe='')}" if self._provider is not None else "",
        }
        return self._render("sign_in.html", None, found, status)

    def _failure(self, visitor: Visitor | None, status: int, text: str) -> Response:
        return self._render("failure.html", visitor, {"status": status, "text": text}, status)

    def _render(self, name: str, visitor: Visitor | None, values: Mapping[str, Any], status: int = 200) -> Response:
        caller = visitor.caller.name if visitor is not None else ""
        may_sign_out = bool(caller) and self._settings.asks_for_tokens
        text = self._templates.get_template(name).render(root=ROOT, caller=caller, may_sign_out=may_sign_out, **values)
        return HTMLResponse(text, status, headers=HEADERS)


def _shown(value: Any) -> Any:
    """Of whatever a template shows: control characters and marks that turn text around are written out."""
    return printable(value, keep=LAYOUT) if isinstance(value, str) and not isinstance(value, Markup) else value


def _peer(request: Request) -> str:
    return f"ip:{request.client.host}:{request.client.port}" if request.client else ""


def _inside(target: str) -> str:
    """A page of the console; whatever else was asked for, the first one."""
    return target if _NEXT.fullmatch(target) else ROOT


async def _form(request: Request) -> dict[str, str]:
    """The fields of a form that one of our own pages has sent. Raises PermissionDeniedError, InvalidFieldsError."""
    origin, site = request.headers.get("origin"), request.headers.get("sec-fetch-site")
    foreign = origin is not None and urlsplit(origin).netloc != request.headers.get("host", "")
    if foreign or site not in (None, "same-origin", "none"):
        raise errors.PermissionDeniedError("This form was sent by another site's page.")
    content = b""
    try:
        async for part in request.stream():
            content += part
            if len(content) > MAX_FORM_BYTES:
                raise errors.InvalidFieldsError([errors.FieldViolation("token", "is longer than any token")])
    except ClientDisconnect:
        return {}
    try:
        fields = parse_qs(content.decode("ascii", "replace"), keep_blank_values=True, max_num_fields=10)
    except ValueError:
        return {}
    return {name: values[0] for name, values in fields.items()}
