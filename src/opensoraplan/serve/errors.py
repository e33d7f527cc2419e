"""Errors of the API, as objects in the shape of OpenAI's: every answer that is no success has one."""

import logging
from collections.abc import Mapping
from http import HTTPStatus

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from sqlalchemy.exc import SQLAlchemyError
from starlette.exceptions import HTTPException

logger = logging.getLogger(__name__)

_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
_CODES = {
    400: "invalid_request",
    401: "invalid_api_key",
    403: "forbidden",
    404: "not_found",
    405: "method_not_allowed",
    409: "not_ready",
    413: "too_large",
    415: "unsupported_media_type",
    416: "range_not_satisfiable",
    422: "idempotency_key_reused",
    429: "queue_full",
    503: "unavailable",
}


class ApiError(Exception):
    """An answer that is no success. `param`: the field of the request that is wrong."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.headers = status, message, param, headers

    def response(self) -> JSONResponse:
        kind = "server_error" if self.status >= 500 else _TYPES.get(self.status, "invalid_request_error")
        code = _CODES.get(self.status, HTTPStatus(self.status).phrase.lower().replace(" ", "_"))
        error = {"message": self.message, "type": kind, "param": self.param, "code": code}
        return JSONResponse({"error": error}, self.status, headers=dict(self.headers or {}))


def answer_errors(app: FastAPI) -> None:
    """Let the app answer every error with an object."""

    @app.exception_handler(ApiError)
    async def api_error(_: Request, error: ApiError) -> JSONResponse:
        return error.response()

    @app.exception_handler(HTTPException)
    async def http_error(_: Request, error: HTTPException) -> JSONResponse:
        return ApiError(error.status_code, str(error.detail), headers=error.headers).response()

    @app.exception_handler(RequestValidationError)
    async def wrong_parameter(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        param = str(first["loc"][-1])
        return ApiError(400, f"{param}: {first['msg']}", param=param).response()

    @app.exception_handler(SQLAlchemyError)
    async def store_error(_: Request, error: SQLAlchemyError) -> JSONResponse:
        logger.warning("the store cannot be reached: %s", error)
        message = "the store of the jobs cannot be reached, try again"
        return ApiError(503, message, headers={"Retry-After": "5"}).response()

    @app.exception_handler(Exception)
    async def bug(_: Request, error: Exception) -> JSONResponse:
        logger.error("an error of the server", exc_info=error)
        return ApiError(500, "the server made an error, which is in its log").response()
