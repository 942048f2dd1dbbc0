"""Is this Redis fit to keep rollouts? Asked once, when a process connects; what it can do is asked by command, not by version."""

from __future__ import annotations

from collections.abc import Mapping

import structlog
from msgspec import Struct
from redis.exceptions import RedisError, ResponseError

from lachesis.broker.errors import ConfigurationError, RedisUnreachable, RedisUnsuitable
from lachesis.broker.store.connection import Redis, hide_password, open_redis
from lachesis.broker.store.redis_errors import Trouble, describe, trouble

OLDEST = (7, 0)
FIRST_S = 2.0  # a server that is just being restarted is waited for; one that is not there is soon said to be so
MARKER = "FUNCTION"  # came with 7.0, as did the script flags (`#!lua flags=…`) that every script here needs


class Server(Struct, frozen=True):
    """What a server says of itself."""

    name: str  # e.g. Valkey 9.1.2
    append_only: bool

    @property
    def durability(self) -> str:
        """In words, whether accepted data outlives the server."""
        if self.append_only:
            return "keeps an append-only file"
        return "NO append-only file: what was accepted is lost when the server ends; set appendonly yes"


async def check_server(url: str) -> Server:
    """What the server is. RedisUnreachable or RedisUnsuitable unless one answers that can keep what it accepts.

    INFO is all that its user must be allowed; a server without an append-only file is warned of in the log.
    """
    shown = hide_password(url)
    redis = open_redis(url, connections=1, patience_s=FIRST_S)
    try:
        info = await redis.info()
        new_enough = await _knows(redis, MARKER)
        nodes = await _nodes(redis) if info.get("cluster_enabled") else 1
    except (RedisError, OSError) as error:
        raise _refusal(shown, error) from None
    finally:
        await redis.aclose()
    name = _name(info)
    if not (_version(info) >= OLDEST if new_enough is None else new_enough):
        raise RedisUnsuitable(f"{name} at {shown} is too old: Lachesis needs Redis 7.0 or newer, or Valkey")
    if info.get("role") == "slave":
        master = f"{info.get('master_host')}:{info.get('master_port')}"
        raise RedisUnsuitable(
            f"Redis at {shown} is a replica, which takes no writes: give its master's address ({master} as it knows it)"
        )
    if nodes > 1:
        raise RedisUnsuitable(
            f"Redis at {shown} is a cluster of several nodes ({nodes} hold slots): use one node that holds all slots, or a Redis that is no cluster"
        )
    policy = str(info.get("maxmemory_policy", "noeviction"))
    if policy != "noeviction":
        raise RedisUnsuitable(
            f"Redis at {shown} has maxmemory-policy {policy}, which would silently delete rollouts; set it to noeviction"
        )
    persistence = (info.get("aof_enabled"), info.get("loading"))  # while it loads its file, it calls that disabled
    server = Server(name, any(int(str(value or 0)) for value in persistence))
    if not server.append_only and structlog.is_configured():  # a command that only looks shows it in its own way
        structlog.get_logger().warning("Redis is not durable", redis=shown, server=name, why=server.durability)
    return server


def _refusal(shown: str, error: Exception) -> Exception:
    """What to tell of an error of the first commands."""
    reason = " ".join(str(error).split()).removesuffix(".") or type(error).__name__
    kind, cause = trouble(error), error.__cause__ or error  # a refused handshake is reported as a lost connection
    if kind is Trouble.FORBIDDEN:
        return RedisUnreachable(f"Redis at {shown} refuses us ({reason}): check user and password in --redis-url")
    if "SELECT is not allowed" in reason or "DB index is out of range" in reason or "Invalid Database" in reason:
        return ConfigurationError(f"redis_url = {shown!r}: this server has no such database ({reason}); use /0")
    if kind is not None and kind is not Trouble.LOST:
        return RedisUnreachable(f"{describe(error)}, at {shown}: start again once that is over")
    if isinstance(cause, ResponseError):
        return RedisUnreachable(f"Redis at {shown} refuses us ({reason}): check user and password in --redis-url")
    return RedisUnreachable(
        f"no Redis answers at {shown} ({reason}). Start one (redis-server --appendonly yes), correct --redis-url, or use --embedded"
    )


async def _nodes(redis: Redis) -> int:
    """How many nodes of its cluster hold slots; 1 where the server does not say."""
    try:
        ranges = await redis.execute_command("CLUSTER SHARDS")
    except ResponseError:
        return 1
    fields = [dict(zip(shard[::2], shard[1::2], strict=True)) if isinstance(shard, list) else shard for shard in ranges]
    return sum(bool(shard.get(b"slots") or shard.get("slots")) for shard in fields)


async def _knows(redis: Redis, command: str) -> bool | None:
    """Whether the server has the command; None where it does not say. (Valkey 9 calls itself redis_version 7.2.4.)"""
    try:
        found = await redis.execute_command("COMMAND INFO", command)
    except ResponseError:
        return None
    return found[0] is not None


def _version(info: Mapping[str, object]) -> tuple[int, ...]:
    return tuple(int(part) for part in str(info.get("redis_version", "0")).split(".")[:2])


def _name(info: Mapping[str, object]) -> str:
    if info.get("server_name") == "valkey":
        return f"Valkey {info.get('valkey_version')}"
    return f"Redis {info.get('redis_version', '?')}"
