// A button that copies a piece of code; where the browser forbids that, it is selected instead.
const copyButton = (code) => {
  const button = document.createElement("button");
  button.type = "button";
  button.textContent = "Copy";
  button.addEventListener("click", async () => {
    try { await navigator.clipboard.writeText(code.textContent); button.textContent = "Copied"; }
    catch { getSelection().selectAllChildren(code); button.textContent = "Selected"; }
  });
  return button;
};
for (const code of document.querySelectorAll("pre.copy > code")) code.parentElement.after(copyButton(code));

// Tooltips that answer at once and on touch; without this script the plain SVG titles remain.
(() => {
  const tip = document.createElement("div");
  tip.id = "tip";
  tip.hidden = true;
  document.body.append(tip);
  for (const title of document.querySelectorAll("figure svg title")) {
    title.parentElement.dataset.tip = title.textContent;
    title.remove();
  }
  const place = (event) => {
    const box = tip.getBoundingClientRect();
    const right = event.clientX + 14 + box.width > innerWidth;
    const low = event.clientY + 18 + box.height > innerHeight;
    tip.style.left = `${Math.max(6, right ? event.clientX - box.width - 14 : event.clientX + 14)}px`;
    tip.style.top = `${Math.max(6, low ? event.clientY - box.height - 12 : event.clientY + 18)}px`;
  };
  const show = (event) => {
    const mark = event.target.closest?.("[data-tip]");
    tip.hidden = !mark;
    if (mark) {
      tip.textContent = mark.dataset.tip;
      place(event);
    }
  };
  for (const kind of ["pointermove", "pointerdown"]) document.addEventListener(kind, show);
  document.addEventListener("scroll", () => { tip.hidden = true; }, { passive: true, capture: true });
})();
