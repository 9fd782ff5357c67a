// Tables and code that scroll sideways can be scrolled by keyboard: the theme makes their boxes, without a tab stop.
document$.subscribe(() => {
  for (const box of document.querySelectorAll(".md-typeset__scrollwrap, .md-typeset pre > code")) {
    if (box.scrollWidth > box.clientWidth) box.tabIndex = 0;
  }
});
