"""What a page can try to have an event stored, each as a script that Chromium runs in it.

Each finds `url` (where events go, with the trick's mark), `body` (the event), and `shop`, an allowed
website. A trick returns when it was tried; whether it was answered is the relay's to tell.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

TRACK = "/api/public/apps/track"
SEGMENT = "/v1/track"
"""Where SDKs post JSON under other names: nothing but the origin tells them from a page."""

HELP = """
const own = location.origin;
const post = options => fetch(url, {method: "POST", body, ...options}).then(it => it.status, String);
const over = (site, to) => site + "/to?url=" + encodeURIComponent(to);
const named = type => new Blob([body], {type});

function submit({action = url, target = "_self"} = {}) {
    document.body.innerHTML = '<iframe name="hidden"></iframe>';
    const form = document.createElement("form"), input = document.createElement("input");
    Object.assign(form, {method: "POST", enctype: "text/plain", action, target});
    // A form writes name=value: the event is cut where a "=" does no harm.
    [input.name, input.value] = body.split("@");
    form.append(input);
    document.body.append(form);
    form.submit();
}

function framed(attributes, source) {
    const said = new Promise(resolve => addEventListener("message", it => resolve(it.data)));
    const frame = document.createElement("iframe");
    for (const [name, value] of Object.entries(attributes)) frame.setAttribute(name, value);
    const asked = JSON.stringify({method: "POST", body});
    const html = `<script>fetch(${JSON.stringify(url)}, ${asked})
        .then(it => it.status, String).then(said => parent.postMessage(said, "*"))<\\/script>`;
    source(frame, html);
    document.body.append(frame);
    return said;
}

const inline = (frame, html) => { frame.srcdoc = html };
const asData = (frame, html) => { frame.src = "data:text/html," + encodeURIComponent(html) };
const asBlob = (frame, html) => {
    frame.src = URL.createObjectURL(new Blob([html], {type: "text/html"}));
};

function worked(worker, replies) {
    const said = new Promise(resolve => { replies.onmessage = it => resolve(it.data) });
    worker.postMessage({url, body});
    return said;
}
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trick:
    """*control* is what an allowed page does instead, where the trick takes its name from any page.

    *hides* says that it does: the browser names no origin then ("null"). *path* is the page's, *to* the
    agent's, and *stored* how an event is answered there.
    """

    script: str
    control: str = ""
    hides: bool = False
    path: str = "/"
    to: str = TRACK
    stored: int = 204


TRICKS = {
    "fetch": Trick(script="return post()"),
    "fetch of JSON": Trick(
        script='return post({headers: {"Content-Type": "application/json"}})',
    ),
    "fetch with a key": Trick(
        script="return post({headers:"
        ' {"Content-Type": "application/json", Authorization: "Bearer x", PublicWriteKey: "x"}})'
    ),
    "fetch with cookies": Trick(script='return post({credentials: "include"})'),
    "fetch without CORS": Trick(script='return post({mode: "no-cors"})'),
    "fetch without CORS, of JSON": Trick(
        script='return post({mode: "no-cors", headers: {"Content-Type": "application/json"}})'
    ),
    "fetch that outlives the page": Trick(script="return post({keepalive: true})"),
    "fetch without a referrer": Trick(script='return post({referrerPolicy: "no-referrer"})'),
    "XMLHttpRequest": Trick(
        script="""
        const request = new XMLHttpRequest();
        request.open("POST", url);
        return new Promise(resolve => { request.onloadend = resolve; request.send(body) });
        """
    ),
    "beacon": Trick(script="navigator.sendBeacon(url, body)"),
    "beacon of JSON": Trick(script='navigator.sendBeacon(url, named("application/json"))'),
    "beacon of what is called text": Trick(script='navigator.sendBeacon(url, named("text/plain"))'),
    "beacon of a page that is left": Trick(
        script="""
        addEventListener("pagehide", () => navigator.sendBeacon(url, body));
        location = "about:blank";
        """
    ),
    "form": Trick(script="submit()"),
    "form into a hidden frame": Trick(script='submit({target: "hidden"})'),
    "form into a new tab": Trick(script='submit({target: "_blank"})'),
    "form without a referrer": Trick(
        script="submit()", path="/?referrer=no-referrer", control="submit()", hides=True
    ),
    "frame": Trick(script="return framed({}, inline)"),
    "sandboxed frame": Trick(
        script='return framed({sandbox: "allow-scripts"}, inline)',
        control='return framed({sandbox: "allow-scripts allow-same-origin"}, inline)',
        hides=True,
    ),
    "frame from data": Trick(
        script="return framed({}, asData)", control="return framed({}, inline)", hides=True
    ),
    "frame from a blob": Trick(script="return framed({}, asBlob)"),
    "worker": Trick(
        script='const worker = new Worker("/worker.js"); return worked(worker, worker)'
    ),
    "service worker": Trick(
        script="""
        const container = navigator.serviceWorker;
        await container.register("/worker.js");
        return worked((await container.ready).active, container);
        """
    ),
    "redirect": Trick(
        script='return fetch(over(own, url), {method: "POST", body}).then(it => it.status, String)'
    ),
    "redirect by an allowed website": Trick(
        script="""
        const asked = {method: "POST", body, mode: "no-cors"};
        return fetch(over(shop, url), asked).then(it => it.type, String);
        """,
        control='return post({mode: "no-cors"})',
        hides=True,
    ),
    "redirect of a form": Trick(
        script="submit({action: over(own, url)})", control="submit()", hides=True
    ),
    "redirect of a form by an allowed website": Trick(
        script="submit({action: over(shop, url)})", control="submit()", hides=True
    ),
    "form of text to Segment's path": Trick(script="submit()", to=SEGMENT, stored=200),
    "fetch without CORS to Segment's path, of what SDKs call a form": Trick(
        script='return post({mode: "no-cors", headers:'
        ' {"Content-Type": "application/x-www-form-urlencoded"}})',
        to=SEGMENT,
        stored=200,
    ),
    "beacon to Segment's path": Trick(
        script="navigator.sendBeacon(url, body)", to=SEGMENT, stored=200
    ),
}


def scripted(script: str, **known: str) -> str:
    """Return *script* with what it may use in front: the names *known*, and `HELP`."""
    constants = "".join(f"const {name} = {json.dumps(text)};" for name, text in known.items())
    return constants + HELP + script
