"""What a browser makes of a page of `figures.py explore`, without a window.

    python tests/browser.py explore.html "check=0,image,5;1,text,2"

prints the numbers that the page shows for these positions (layer, modality, number) as JSON. It
takes Chromium, as Debian's package chromium has it, or Chrome.
"""

import html
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
SECONDS = 240  # of a browser on a busy machine


def find_browser():
    """The path of a browser; None where there is none."""
    for name in NAMES:
        path = shutil.which(name)
        if path:
            return path
    return None


def run_browser(page, fragment, *flags):
    """What the browser prints about a page that is opened at #fragment."""
    with tempfile.TemporaryDirectory() as profile:
        command = [find_browser(), "--headless", "--no-sandbox", "--disable-gpu"]
        command += [f"--user-data-dir={profile}", "--disable-dev-shm-usage", *flags]
        command.append(f"{Path(page).resolve().as_uri()}#{fragment}")
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    return done.stdout


def read_page(page, fragment):
    """The page after its scripts have run, as HTML."""
    return run_browser(page, fragment, "--dump-dom")


def numbers_shown(document):
    """What stands in the element `check` of such a document."""
    text = re.search(r'<pre id="check"[^>]*>(.*?)</pre>', document, re.DOTALL).group(1)
    return json.loads(html.unescape(text))


def take_picture(page, fragment, out, size=(1200, 900), is_dark=False):
    """A screenshot as PNG."""
    flags = ["--hide-scrollbars", f"--window-size={size[0]},{size[1]}", f"--screenshot={out}"]
    flags.append(f"--blink-settings=preferredColorScheme={0 if is_dark else 1}")
    run_browser(page, fragment, *flags)


if __name__ == "__main__":
    if find_browser() is None:
        sys.exit("there is no browser: install Chromium (apt-get install -y chromium)")
    print(json.dumps(numbers_shown(read_page(sys.argv[1], sys.argv[2])), indent=1))
