"""The pictures of the README, from the real console on recorded machines: python -m tests.screens.make_screenshots"""

import asyncio
from pathlib import Path

from tests.screens.test_screens import console, ready, restore_plan, under_way

OUT = Path(__file__).parents[2] / "assets/screenshots"


async def main() -> None:
    OUT.mkdir(parents=True, exist_ok=True)
    app = console("broken-active")
    async with app.run_test(size=(80, 24)) as pilot:
        await ready(pilot)
        (OUT / "home.svg").write_text(app.export_screenshot(title="cos-console"))
        app.plan = restore_plan()
        app._go("plan")
        await pilot.pause()
        (OUT / "plan.svg").write_text(app.export_screenshot(title="cos-console"))
        app.state = under_way()
        app._go("progress")
        await pilot.pause()
        (OUT / "progress.svg").write_text(app.export_screenshot(title="cos-console"))


if __name__ == "__main__":
    asyncio.run(main())
