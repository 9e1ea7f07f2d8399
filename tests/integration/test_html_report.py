"""The simulator's HTML report in a browser: what it shows is what was simulated, and it needs nothing but its own file."""

from __future__ import annotations

import html
import json
import re
import shutil
import struct
import subprocess
import zlib
from collections import Counter
from pathlib import Path

import pytest

from tierwise import _core

_BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_RUN = ["run", "--model", "llama2-7b", "--micro-batch", "4", "--device-budget", "60GB", "--host-budget", "200GB"]
_WIDTH, _HEIGHT = 1100, 900


@pytest.fixture(scope="module")
def browser() -> str:
    """Path of a Chromium."""
    found = next((path for path in map(shutil.which, _BROWSERS) if path is not None), None)
    if found is None:
        pytest.skip("no Chromium: install Debian's package `chromium`")
    return found


def _look(browser: str, folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", f"--user-data-dir={folder / 'profile'}"]
    # Whatever the page asked of the network would be refused, and shown as an error.
    flags += ["--host-resolver-rules=MAP * ~NOTFOUND", f"--window-size={_WIDTH},{_HEIGHT}", "--hide-scrollbars"]
    page = (folder / "report.html").as_uri()
    return subprocess.run([browser, *flags, *options, page], capture_output=True, text=True, timeout=100, check=True)


@pytest.fixture
def report(tmp_path: Path) -> dict[str, object]:
    """The simulated step; its page is `report.html`."""
    page = tmp_path / "report.html"
    code, out, log = _core.sim_output([*_RUN, "--format", "json", "--html", str(page)])
    assert code == 0, log
    answer: dict[str, object] = json.loads(out)
    return answer


def _pixels(path: Path) -> Counter[bytes]:
    """Colours of an 8-bit RGB or RGBA image and how often each occurs."""
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG")
    at, packed, header = 8, b"", b""
    while at < len(data):
        size, kind = struct.unpack(">I4s", data[at : at + 8])
        body = data[at + 8 : at + 8 + size]
        header = body if kind == b"IHDR" else header
        packed += body if kind == b"IDAT" else b""
        at += 12 + size
    width, height, depth, colour = struct.unpack(">IIBB", header[:10])
    assert (width, height, depth) == (_WIDTH, _HEIGHT, 8)
    step = {2: 3, 6: 4}[colour]
    raw = zlib.decompress(packed)
    stride = width * step
    found: Counter[bytes] = Counter()
    above = bytearray(stride)
    for row in range(height):
        start = row * (stride + 1)
        kind, line = raw[start], bytearray(raw[start + 1 : start + 1 + stride])
        for i in range(stride):
            left = line[i - step] if i >= step else 0
            corner = above[i - step] if i >= step else 0
            line[i] = (line[i] + _predicted(kind, left, above[i], corner)) & 255
        found.update(bytes(line[i : i + 3]) for i in range(0, stride, step))
        above = line
    return found


def _predicted(kind: int, left: int, up: int, corner: int) -> int:
    if kind == 4:
        guess = left + up - corner
        distances = ((abs(guess - left), 0, left), (abs(guess - up), 1, up), (abs(guess - corner), 2, corner))
        return min(distances)[2]
    return (0, left, up, (left + up) // 2)[kind]


def test_the_page_shows_what_was_simulated(browser: str, report: dict[str, object], tmp_path: Path) -> None:
    dom = _look(browser, tmp_path, "--dump-dom").stdout
    text = html.unescape(re.sub(r"<[^>]*>", " ", dom))
    step = report["step"]
    assert isinstance(step, dict)
    assert "<h1>llama2-7b on 1 x h100, tierwise</h1>" in dom
    assert f"{step['step_ns'] / 1e9:.3f} s per step" in text
    assert f"Peak {step['device_peak_bytes'] / 1e9:.2f} GB at {step['device_peak_op']}" in text
    for name, ns in step["stalls"].items():
        assert f"{ns / 1e9:.3f} s" in text, name
    # The line of device memory has a point for every change, inside the frame.
    line = re.search(r'<path id="device-bytes" d="([^"]+)"', dom)
    assert line is not None
    heights = [float(value) for value in re.findall(r"[MV](?:0 )?([\d.]+)", line[1])]
    assert len(heights) > 60
    assert all(0 <= height <= 200 for height in heights)
    assert max(heights) - min(heights) > 10, "the activations come and go"
    assert "<script" not in dom
    assert not re.search(r"https?://(?!www\.w3\.org/)", dom)


def test_the_page_is_drawn(browser: str, report: dict[str, object], tmp_path: Path) -> None:
    image = tmp_path / "report.png"
    _look(browser, tmp_path, f"--screenshot={image}")
    colours = _pixels(image)
    assert colours.most_common(1)[0][0] == b"\xff\xff\xff"
    assert colours[bytes.fromhex("f6f6f6")] > 50_000, "the frame of the memory line"
    assert colours[bytes.fromhex("225577")] > 2_000, "the line and the bars"
    # The dashed line of the budget is one pixel high and lies between two, so its red is mixed with the frame.
    assert sum(count for (red, green, blue), count in colours.items() if red > green + 40 and red > blue + 40) > 400, "the budget"
