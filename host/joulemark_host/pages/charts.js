// Draws every definition on the page in the viewer's theme, and again when the theme changes.
"use strict";
(() => {
  const themes = JSON.parse(document.getElementById("themes").textContent);
  const dark = matchMedia("(prefers-color-scheme: dark)");

  async function draw(holder) {
    const definition = JSON.parse(document.getElementById(holder.dataset.definition).textContent);
    const colours = themes[dark.matches ? "dark" : "light"];
    for (const param of definition.params) {
      if (param.name in colours) param.value = colours[param.name];
    }
    try {
      // ast: expressions are interpreted, not compiled, so the page's policy can forbid eval.
      await vegaEmbed(holder, definition, {
        mode: "vega-lite",
        ast: true,
        actions: false,
        renderer: "svg",
        defaultStyle: false,
        tooltip: { disableDefaultStyle: true, theme: "custom" },
      });
      holder.dataset.drawn = "yes";
    } catch (error) {
      holder.textContent = `The chart could not be drawn (${error}). The table below holds the same figures.`;
    }
  }

  const drawAll = () => document.querySelectorAll(".chart").forEach(draw);
  dark.addEventListener("change", drawAll);
  drawAll();
})();
