// Draws the page's charts in the colours of the page, and again when the reader's light or dark setting changes.
(() => {
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const axis = (given) => ({
    automargin: true, gridcolor: colour("--line"), zerolinecolor: colour("--line"), linecolor: colour("--line"),
    fixedrange: true, ...given, title: { standoff: 8, font: { size: 13 }, ...given.title },
  });
  const draw = () => {
    for (const [id, figure] of Object.entries(figures)) {
      const layout = {
        ...figure.layout,
        font: { family: getComputedStyle(document.body).fontFamily, size: 13, color: colour("--soft") },
        paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
        margin: { l: 10, r: 12, t: 12, b: 10 },
        hoverlabel: { bgcolor: colour("--card"), bordercolor: colour("--line"), font: { color: colour("--ink") } },
        xaxis: axis(figure.layout.xaxis), yaxis: axis(figure.layout.yaxis),
      };
      Plotly.react(id, figure.data, layout, { responsive: true, displayModeBar: false, showSendToCloud: false });
    }
  };
  draw();
  window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
})();
