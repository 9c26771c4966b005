"""Pages in headless Chromium: what overflows or overlaps, what they ask for, how they look."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
_POLICY = re.compile(r'<meta http-equiv="Content-Security-Policy"[^>]*>')
_LOOK = """
const say = {}, w = innerWidth;
say.overflow = Math.max(0, document.scrollingElement.scrollWidth - w);
say.wide = [...document.querySelectorAll("body *")].filter(e => !e.closest("svg, .scroll, .skip")
  && e.getBoundingClientRect().right > w + 1).map(e => e.tagName + " " + e.textContent);
say.outside = []; say.overlaps = []; say.figures = 0; say.empty = [];
for (const svg of document.querySelectorAll("figure svg")) {
  say.figures++;
  const box = svg.getBoundingClientRect(), title = svg.querySelector("title").textContent;
  if (!svg.querySelector("path[style*=series]") && !svg.querySelector("use[style*=series]"))
    say.empty.push(title);
  const texts = [...svg.querySelectorAll("text")].filter(t => t.textContent.trim());
  const boxes = texts.map(t => t.getBoundingClientRect());
  boxes.forEach((b, i) => {
    if (b.left < box.left - 1 || b.right > box.right + 1 || b.top < box.top - 1
        || b.bottom > box.bottom + 1) say.outside.push(title + ": " + texts[i].textContent);
    for (let j = 0; j < i; j++) {
      const c = boxes[j];
      const x = Math.min(b.right, c.right) - Math.max(b.left, c.left);
      const y = Math.min(b.bottom, c.bottom) - Math.max(b.top, c.top);
      if (x > 2 && y > 0.35 * Math.min(b.height, c.height))
        say.overlaps.push(title + ": " + texts[i].textContent + " / " + texts[j].textContent);
    }
  });
}
say.headings = [...document.querySelectorAll("h1, h2, h3, h4")].map(h => +h.tagName[1]);
say.load = performance.timing.domContentLoadedEventEnd - performance.timing.navigationStart;
say.loaded = performance.now();
const out = document.createElement("pre"); out.id = "findings";
out.textContent = JSON.stringify(say); document.body.append(out);
"""


def chromium(*arguments: str, profile: Path, width: int = 1280, height: int = 900,
             seconds: int = 60) -> str:
    """Run Chromium to its end, without a network; what it prints. No process is left."""
    assert CHROMIUM is not None
    command = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run",
               "--disable-extensions", "--disable-background-networking", "--disable-sync",
               "--disable-component-update", "--host-resolver-rules=MAP * ~NOTFOUND",
               f"--user-data-dir={profile}", f"--window-size={width},{height}", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                               text=True, start_new_session=True)
    try:
        return process.communicate(timeout=seconds)[0]
    finally:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        process.wait()


def without_policy(page: str) -> str:
    """A page that scripts and images may be put into."""
    return _POLICY.sub("", page)


def look(page: Path, folder: Path, *, width: int, print_media: bool = False) -> dict[str, Any]:
    """What a script finds in a copy of the page, shown in a frame of ``width`` CSS pixels.

    A window of Chromium has a least width, a frame has none.
    """
    text = without_policy(page.read_text())
    if print_media:
        text = text.replace("@media print", "@media all").replace("@media screen", "@media print")
    script = _LOOK + "parent.postMessage(out.textContent, '*');"
    inner = folder / f"inner-{width}.html"
    inner.write_text(text.replace("</body>", f"<script>addEventListener('load', () => "
                                  f"setTimeout(() => {{ {script} }}, 50));</script></body>"))
    outer = folder / f"outer-{width}.html"
    outer.write_text("<!DOCTYPE html><script>addEventListener('message', e => { "
                     "const p = document.createElement('pre'); p.id = 'findings'; "
                     "p.textContent = e.data; document.body.append(p); });</script>"
                     f"<iframe src='{inner.name}' style='border:0' width='{width}' height='900'>"
                     "</iframe>")
    shown = chromium("--dump-dom", "--virtual-time-budget=20000", outer.as_uri(),
                     profile=folder / f"profile-{width}", width=max(width, 600) + 40)
    found = re.search(r'<pre id="findings">(.*?)</pre>', shown, re.S)
    assert found, shown[-2000:]
    return dict(json.loads(html.unescape(found[1])))
