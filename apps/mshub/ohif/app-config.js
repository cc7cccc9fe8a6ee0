/*
 * OHIF's settings at /viewer/: images come from the PACS through this server, and MSHub is one more mode.
 * The extension and the mode are ES modules, loaded by OHIF's own plug-in loader; OHIF itself is not changed.
 */
window.config = {
  name: 'mshub',
  routerBasename: '/viewer/',
  extensions: ['/viewer/extension/extension.js'],
  modes: ['/viewer/extension/mode.js'],
  showStudyList: true,
  groupEnabledModesFirst: true,
  maxNumberOfWebWorkers: 3,
  showWarningMessageForCrossOrigin: false,
  showCPUFallbackMessage: true,
  showLoadingIndicator: true,
  strictZSpacingForVolumeViewport: true,
  showErrorDetails: 'always',
  httpErrorHandler: error => console.warn('an image was not loaded', error),
  investigationalUseDialog: { option: 'never' },
  maxNumRequests: { interaction: 100, thumbnail: 5, prefetch: 25 },
  whiteLabeling: {
    createLogoComponentFn: React =>
      React.createElement(
        'span',
        { title: 'MSHub in OHIF', style: { color: '#fff', fontSize: '15px', fontWeight: 600, whiteSpace: 'nowrap' } },
        'MSHub',
        React.createElement('span', { style: { color: '#7bb2ce', fontWeight: 400, marginLeft: '6px' } }, 'OHIF'),
        React.createElement('mshub-account')
      ),
  },
  customizationService: {
    global: {
      // OHIF's own DICOM SEG export: one bit per voxel and segment, not compressed, which every reader and PACS knows;
      // its defaults are LABELMAP and RLE.
      'segmentation.store.defaultMode': { $set: 'bitmap' },
      'segmentation.store.transferSyntaxUID': { $set: '1.2.840.10008.1.2.1' },
    },
  },
  defaultDataSourceName: 'pacs',
  dataSources: [
    {
      namespace: '@ohif/extension-default.dataSourcesModule.dicomweb',
      sourceName: 'pacs',
      configuration: {
        friendlyName: 'PACS behind this MSHub server',
        name: 'pacs',
        qidoRoot: '/proxy/dicom',
        wadoRoot: '/proxy/dicom',
        wadoUriRoot: '/proxy/dicom',
        qidoSupportsIncludeField: true,
        imageRendering: 'wadors',
        thumbnailRendering: 'wadors',
        enableStudyLazyLoad: true,
        supportsFuzzyMatching: false,
        supportsWildcard: true,
        dicomUploadEnabled: false,
        omitQuotationForMultipartRequest: true,
        bulkDataURI: { enabled: true, relativeResolution: 'studies' },
      },
    },
  ],
};
