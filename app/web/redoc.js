Redoc.init("openapi.json", { theme: { typography: { fontFamily: "system-ui, sans-serif" } } }, document.getElementById("docs"));
