"""How the pages look: a theme of system fonts, one style sheet, one mark. Nothing is fetched from anywhere."""

from __future__ import annotations

from importlib import resources
from typing import Any


def build_theme() -> Any:
    """Gradio's theme object."""
    import gradio as gr

    clay = gr.themes.Color(
        name="clay",
        c50="#fdf6f0",
        c100="#faeadc",
        c200="#f3d2b5",
        c300="#eab488",
        c400="#df8f57",
        c500="#cf7136",
        c600="#b0582a",
        c700="#8f4524",
        c800="#733a22",
        c900="#5f321f",
        c950="#33180e",
    )
    return gr.themes.Base(
        primary_hue=clay,
        secondary_hue=clay,
        neutral_hue=gr.themes.colors.stone,
        radius_size=gr.themes.sizes.radius_lg,
        font=["ui-sans-serif", "system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"],
        font_mono=["ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace"],
    ).set(
        body_background_fill="*neutral_50",
        body_background_fill_dark="*neutral_950",
        block_border_width="0px",
        block_shadow="none",
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_hover="*primary_700",
        button_primary_background_fill_dark="*primary_600",
        button_primary_background_fill_hover_dark="*primary_500",
        button_primary_text_color="white",
    )


def read_asset(name: str) -> str:
    """The text of a file under `assets/`."""
    return (resources.files("chaccu.web") / "assets" / name).read_text(encoding="utf-8")
