"""The page that shows the API: made of its OpenAPI document, without scripts."""

from __future__ import annotations

import html
import json
import re
from typing import Any

from .._version import __version__

CODE = re.compile("`([^`]+)`")


def openapi_page(document: dict[str, Any]) -> str:
    """The requests of an OpenAPI document, their parameters and answers, as HTML."""
    schemas = document.get("components", {}).get("schemas", {})
    groups: dict[str, list[str]] = {}
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            tag = (operation.get("tags") or ["other"])[0]
            groups.setdefault(tag, []).append(_operation(method, path, operation, schemas))
    sections = "".join(
        f'<section id="{html.escape(tag)}"><h2>{html.escape(tag.capitalize())}</h2>'
        f"{''.join(operations)}</section>"
        for tag, operations in groups.items()
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<title>API of wavprune</title><link rel="icon" href="data:,">'
        '<link rel="stylesheet" href="/static/style.css"></head>'
        f'<body class="document"><header><h1>API</h1><p>wavprune {__version__}. '
        '<a href="/">The page</a>, <a href="/api/v1/openapi.json">the OpenAPI document</a>.</p>'
        f"<p>{html.escape(document['info'].get('description', ''))}</p></header>"
        f"<main>{sections}</main></body></html>"
    )


def _operation(method: str, path: str, operation: dict[str, Any], schemas: dict[str, Any]) -> str:
    parts = [
        f"<article><h3><code>{method.upper()} {html.escape(path)}</code></h3>",
        f"<p>{_prose(operation.get('description', ''))}</p>",
    ]
    rows = [
        (parameter["name"], parameter["in"], parameter["schema"], parameter.get("description", ""))
        for parameter in operation.get("parameters", ())
    ]
    for kind, content in operation.get("requestBody", {}).get("content", {}).items():
        schema = _resolved(content["schema"], schemas)
        if "properties" not in schema:
            rows.append(("body", kind, schema, ""))
        for name, field in schema.get("properties", {}).items():
            rows.append((name, "JSON", field, field.get("description", "")))
    if rows:
        parts.append("<table><thead><tr><th>name<th>in<th>type<th></tr></thead><tbody>")
        for name, where, schema, text in rows:
            cells = (name, where, _type(schema), text)
            parts.append(f"<tr>{''.join(f'<td>{html.escape(str(cell))}' for cell in cells)}</tr>")
        parts.append("</tbody></table>")
    answers = [
        f"<li><code>{status}</code> {html.escape(answer['description'])}: "
        f"{html.escape(_answer(answer, schemas))}"
        for status, answer in operation["responses"].items()
        if status.startswith("2")
    ]
    return f"{''.join(parts)}<ul>{''.join(answers)}</ul></article>"


def _prose(text: str) -> str:
    return CODE.sub(r"<code>\1</code>", html.escape(text))


def _answer(answer: dict[str, Any], schemas: dict[str, Any]) -> str:
    for kind, content in answer.get("content", {}).items():
        schema = content.get("schema", {})
        items = schema.get("items", schema)
        fields = _resolved(items, schemas).get("properties")
        if fields:
            return str(("a list of " if "items" in schema else "") + ", ".join(fields))
        return str(kind)
    return "nothing"


def _resolved(schema: dict[str, Any], schemas: dict[str, Any]) -> dict[str, Any]:
    name = schema.get("$ref", "").rpartition("/")[2]
    found: dict[str, Any] = schemas.get(name, schema)
    return found


def _type(schema: dict[str, Any]) -> str:
    options = schema.get("anyOf") or [schema]
    names = []
    for option in options:
        if "enum" in option:
            names.append(" | ".join(map(str, option["enum"])))
        elif option.get("type") not in (None, "null"):
            names.append(option["type"])
    default = schema.get("default")
    shown = "" if default is None else f" = {json.dumps(default)}"
    return f"{' or '.join(names)}{shown}"
